//! The shim's program, see the library.

fn main() -> std::process::ExitCode {
    davit_shim::main(option_env!("DAVIT_SHIM_BUILD").unwrap_or("unnamed"))
}
