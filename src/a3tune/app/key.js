// The tab remembers by which key the server knows its session, until the tab is closed.
(key) => sessionStorage.getItem('a3tune')
