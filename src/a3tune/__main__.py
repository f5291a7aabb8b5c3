"""`python -m a3tune`, as launchers of several processes want it: the command `a3tune`."""

from a3tune.cli import main

if __name__ == "__main__":
    main()
