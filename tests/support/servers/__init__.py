"""Servers of object stores on loopback, and what stands between them and a client.

The fixtures are in `fixtures`; `tests/conftest.py` offers them to every test.
"""
