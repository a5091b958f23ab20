"""Records that packages pass to each other: plain, printable data without torch."""
