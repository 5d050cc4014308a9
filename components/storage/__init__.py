"""Stores (local folder, S3), shards, manifests, campaigns, images: everything that a step reads and writes."""
