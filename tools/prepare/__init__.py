"""The rooms behind tools/prepare_data.py: from real images on disk to shards with a manifest."""
