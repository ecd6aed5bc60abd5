"""Images: sources, decoding, Parquet shards, and the order in which training sees them."""
