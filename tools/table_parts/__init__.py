"""The table of `lowbit reproduce --config small|paper`: its rows, statistics, pictures and costs."""
