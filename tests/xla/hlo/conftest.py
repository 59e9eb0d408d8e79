"""What pytest leaves alone."""

collect_ignore = ["make_samples.py"]  # compiles anew, with an environment of its own
