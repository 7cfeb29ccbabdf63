"""Experience from several copies of the training environment, in this process or in others."""
