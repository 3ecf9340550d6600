// What libraries compiled by a newer gcc and glibc ask of these and older ones do not have. wheels/build.py links it
// into liboplora_torch.so; nothing of it is visible from outside.
#include <new>

#define HIDDEN __attribute__((visibility("hidden")))

// glibc 2.32. 0: count references with atomic operations, as older ones do.
extern "C" HIDDEN char __libc_single_threaded = 0;

// libstdc++ of gcc 11
namespace std {
HIDDEN void __throw_bad_array_new_length() { throw bad_array_new_length(); }
} // namespace std
