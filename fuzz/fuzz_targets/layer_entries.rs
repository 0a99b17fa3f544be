//! See `davit_fuzz::layer_entries`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| davit_fuzz::layer_entries(data));
