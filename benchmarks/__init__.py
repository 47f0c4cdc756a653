"""What low-rank fine-tuning costs, in GIFt and in its peers: ``python -m benchmarks``. README.md says what each row means."""
