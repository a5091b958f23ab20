"""Recurrent layers: scans over trees, running states, and ways back to earlier states."""
