"""From noise to images: solvers compiled to plans, and the model they run on."""
