//! Compares a daemon with the model of the API for as many steps as one likes:
//! `api-model [--peer] [--steps N] [--seed N] [--kills N] [--without RULE]`. With `--peer` the daemon is containerd, Debian's or the program that
//! `DAVIT_PEER_CONTAINERD` names, without the rules that its version does not have.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use davit_integration::model::rule::Rule;
use davit_integration::model::run::{Plan, run};
use davit_integration::model::subject;

fn main() -> Result<()> {
    let seed = u64::from(SystemTime::now().duration_since(UNIX_EPOCH)?.subsec_nanos());
    let mut plan = Plan { seed, steps: 10_000, kills: 150, without: Vec::new(), seeded: Rule::ALL.to_vec() };
    let mut peer = false;
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        if arg == "--peer" {
            peer = true;
            continue;
        }
        if arg == "--without" {
            let name = args.next().unwrap_or_default();
            let rule = Rule::ALL.into_iter().find(|rule| format!("{rule:?}") == name);
            plan.without.push(rule.with_context(|| format!("no rule {name}"))?);
            continue;
        }
        let value: u64 = args.next().with_context(|| format!("{arg} needs a number"))?.parse()?;
        match arg.as_str() {
            "--steps" => plan.steps = value,
            "--seed" => plan.seed = value,
            "--kills" => plan.kills = value,
            other => bail!("unknown flag {other}"),
        }
    }
    println!("seed {}", plan.seed);
    let summary = if peer {
        plan.without.extend(subject::peer()?.unknown_rules());
        run(&plan, subject::peer)?
    } else {
        run(&plan, subject::ours)?
    };
    println!("{summary}");
    let missed: Vec<Rule> = plan
        .seeded
        .into_iter()
        .filter(|rule| !summary.caught.contains_key(rule) && !plan.without.contains(rule))
        .collect();
    println!("not found: {missed:?}");
    Ok(())
}
