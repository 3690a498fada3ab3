"""Adapters to other libraries, one file for each, which is imported when it is used."""
