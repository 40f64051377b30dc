"""Device sections: their ends, their fields, and the description that QEMU writes after them."""
