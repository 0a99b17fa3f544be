//! The metrics of the daemon and of its containers, as Prometheus reads them.

use std::io::{Read, Write};
use std::net::TcpStream;

use anyhow::{Context, Result, ensure};
use davit_integration::{Daemon, image, loopback, wait};

use crate::root;

fn ask(address: &str, request: &str) -> Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(wait::PATIENCE))?;
    stream.write_all(request.as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

#[test]
fn metrics_tell_of_the_daemon_and_its_containers() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let address = loopback::address().to_string();
    let daemon =
        Daemon::start_with(&[], &format!("[metrics]\naddress = \"{address}\"\ngrpc_histogram = true\n"))?;
    daemon.import_busybox()?;
    let ctr = daemon.ctr();
    ctr.run(&format!("run -d {} counted sleep 3600", image::BUSYBOX))?;
    let get = || ask(&address, "GET /v1/metrics HTTP/1.1\r\nHost: x\r\n\r\n");
    let labels = format!(
        "{{container_id=\"counted\",namespace=\"{}\",runtime=\"io.containerd.runc.v2\"}} ",
        daemon.namespace()
    );
    // `runc start` does not wait until the threads of `runc init` are gone, which the cgroup counts.
    let alone = format!("\ncontainer_pids_current{labels}1\n");
    let page = wait::until("the container is one thread", || get().ok().filter(|page| page.contains(&alone)));
    let page = page.with_context(|| get().unwrap_or_default())?;
    let (head, body) = page.split_once("\r\n\r\n").unwrap_or_default();
    ensure!(head.starts_with("HTTP/1.1 200 OK\r\n") && head.contains("version=0.0.4"), "{head}");
    ensure!(body.contains("containerd_build_info_total{revision="), "{body}");
    ensure!(body.contains("process_resident_memory_bytes "), "{body}");
    let started =
        "grpc_method=\"Start\",grpc_service=\"containerd.services.tasks.v1.Tasks\",grpc_type=\"unary\"";
    for line in [
        format!("grpc_server_started_total{{{started}}} 1"),
        format!("grpc_server_handled_total{{grpc_code=\"OK\",{started}}} 1"),
        format!("grpc_server_msg_received_total{{{started}}} 1"),
        format!("grpc_server_msg_sent_total{{{started}}} 1"),
        format!("grpc_server_handling_seconds_bucket{{{started},le=\"+Inf\"}} 1"),
    ] {
        ensure!(body.lines().any(|found| found == line), "{line} is not in\n{body}");
    }
    let value = |name: &str| {
        let line = body.lines().find(|line| line.starts_with(&format!("{name}{labels}")));
        line.and_then(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
    };
    let memory = value("container_memory_usage_usage_bytes").or(value("container_memory_usage_bytes"));
    ensure!(memory > Some(0.0), "{body}");

    for (request, status) in [
        ("POST /v1/metrics HTTP/1.1\r\n\r\n", "405"),
        ("GET / HTTP/1.1\r\n\r\n", "404"),
        ("nonsense\r\n\r\n", "400"),
        // What a browser asks that was led here by the name of a site.
        ("GET /v1/metrics HTTP/1.1\r\nHost: site.example:1338\r\n\r\n", "421"),
    ] {
        let answer = ask(&address, request)?;
        ensure!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{request}: {answer}");
    }
    ensure!(ask(&address, &format!("GET /{} HTTP/1.1", "x".repeat(10_000))).unwrap_or_default().is_empty());
    ctr.run("tasks kill -s SIGKILL counted")?;
    Ok(())
}

#[test]
fn who_connects_and_says_nothing_keeps_nobody_out() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let address = loopback::address().to_string();
    let _daemon = Daemon::start_with(&[], &format!("[metrics]\naddress = \"{address}\"\n"))?;
    let mut silent = Vec::new();
    for _ in 0..150 {
        silent.push(TcpStream::connect(&address)?);
    }
    let answer = ask(&address, "GET /v1/metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")?;
    ensure!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    Ok(())
}
