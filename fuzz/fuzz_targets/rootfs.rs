//! See `davit_fuzz::rootfs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| davit_fuzz::rootfs(data));
