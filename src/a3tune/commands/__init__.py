"""What each command does, over a `RunConfig`: one file per command. No domain logic; prints nothing."""
