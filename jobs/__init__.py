"""Entry points: the command line, the training job, benchmarks."""
