"""Sparse attention: for videos and large pictures, which keys a query need not visit."""
