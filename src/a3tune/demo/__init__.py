"""The whole chain on phantom scans: what it does (`plan`, light) and doing it (`run`)."""
