"""Measurements as ratios in one run on one machine; see README.md beside this file."""
