#pragma once

namespace lowbit {

// Prints a line for each instruction set; whether all were right.
bool test_rows();
bool test_digits();  // selftest_digits.cpp

}  // namespace lowbit
