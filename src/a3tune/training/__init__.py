"""Fine-tuning with both losses: batches, the trainer, one run from configuration to adapter."""
