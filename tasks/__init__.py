"""Where it runs: the stages as Ray tasks, Ray Train and Ray Serve, and the command line."""
