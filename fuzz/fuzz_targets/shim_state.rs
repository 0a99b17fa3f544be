//! See `davit_shim::inputs::state`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| davit_fuzz::shim::state(data));
