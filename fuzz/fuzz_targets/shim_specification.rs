//! See `davit_shim::inputs::specification`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| davit_fuzz::shim::specification(data));
