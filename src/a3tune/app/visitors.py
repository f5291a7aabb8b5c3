"""Who comes back: a tab that is loaded again finds its session, as long as Gradio keeps it. Keeps none alive itself."""

import secrets
from weakref import WeakValueDictionary

from a3tune.app.session import Session


class Visitors:
    """Sessions by the key that their tab remembers."""

    def __init__(self) -> None:
        self._sessions: WeakValueDictionary[str, Session] = WeakValueDictionary()

    def keep(self, session: Session) -> None:
        """From now on its key stands for this one."""
        self._sessions[session.key] = session

    def arrive(self, key: str | None, begin: Session) -> Session:
        """What a tab had, else `begin`; under a new key, since tabs that are doubled remember the same one."""
        session = self._sessions.get(key or "", begin).copied(secrets.token_hex(16))
        self.keep(session)
        return session
