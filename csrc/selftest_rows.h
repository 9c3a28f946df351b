#pragma once

namespace lowbit {

// Prints a line for each instruction set; whether all were right.
bool test_rows();

}  // namespace lowbit
