"""Device sections: where one ends, what is inside, and the description that QEMU writes behind them."""
