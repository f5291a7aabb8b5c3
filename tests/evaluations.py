"""What tests of evaluations share."""


def stop_after(calls: int):
    """A progress that is interrupted at its so many-th call."""

    def progress(done: int, total: int) -> None:
        nonlocal calls
        calls -= 1
        if not calls:
            raise KeyboardInterrupt

    return progress
