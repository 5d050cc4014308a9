"""Research about the project, which is not installed: pretraining of the tiny policy, and parts of the study."""
