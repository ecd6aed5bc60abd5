"""Pictures of numbers, as PNG: noise schedules, and the figures of an evaluation."""
