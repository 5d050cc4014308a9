"""Stores (local folder, S3), shards, manifests, campaigns, images: all that a step reads and writes."""
