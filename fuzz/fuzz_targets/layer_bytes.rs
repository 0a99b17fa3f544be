//! See `davit_fuzz::layer_bytes`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| davit_fuzz::layer_bytes(data));
