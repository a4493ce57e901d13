"""`kata bench`: what a decoding step costs on the device at hand, measured beside what the counts predict."""
