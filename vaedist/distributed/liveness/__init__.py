"""Finds processes that live but do not work: stopped ones by their silence, stalled ones by their training thread."""
