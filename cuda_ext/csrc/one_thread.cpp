// From glibc 2.32 on shared_ptr reads this variable: whether the process has one thread, so that it may count without
// atomics. Older ones have no such variable, and a library that asks for it does not load there. Ours always says no.
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}
