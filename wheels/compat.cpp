// What libraries compiled by a newer gcc and glibc ask of these, and older ones do not have. wheels/build.py links it
// into each library; nothing of it is visible from outside.
#include <new>
#include <sstream>

// glibc 2.32. 0: count references with atomic operations, as older ones do.
extern "C" char __libc_single_threaded = 0;

// libstdc++ of gcc 9: their default constructors
template class std::basic_ostringstream<char>;
template class std::basic_stringstream<char>;

// libstdc++ of gcc 11
namespace std {
void __throw_bad_array_new_length() { throw bad_array_new_length(); }
} // namespace std
