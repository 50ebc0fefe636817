"""Measurements that write JSON with quality, memory, seconds, device and commit."""
