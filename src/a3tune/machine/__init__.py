"""What this machine gives: files written whole or not at all, processes, threads, workers. Knows nothing of models."""
