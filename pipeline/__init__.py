"""What is computed: data format, diffusion mathematics, networks, training, sampling. No Ray."""
