"""The machine: its devices, memory, disk and links, and their measured rates."""
