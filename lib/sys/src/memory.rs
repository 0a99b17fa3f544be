//! The allocator.

/// Has all threads of this process share one heap. By itself glibc gives each new thread a heap of its own, which stays
/// when the thread is gone (mallopt(3), `M_ARENA_MAX`). Elsewhere this does nothing.
pub fn share_one_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: the call takes integers alone, and is made for threads that do not exist yet.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}
