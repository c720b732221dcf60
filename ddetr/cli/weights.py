"""The commands `ddetr weights ...`: what files of weights hold, where they come from, and where they go."""
