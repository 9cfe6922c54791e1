"""Measurements that are published: each module writes files into `results`."""
