//! Each incident in a task's life, and any of them in any order.

use super::*;
use proptest::prelude::*;
use std::time::Duration;

const NOW: SystemTime = SystemTime::UNIX_EPOCH;

fn exit(pid: u32, status: u32) -> Exit {
    Exit { pid, status, exited_at: Some(NOW + Duration::from_secs(u64::from(pid))) }
}

fn live() -> Machine {
    let mut machine = Machine::creating("c");
    assert_eq!(machine.apply(Input::Created { pid: 10 }), []);
    machine
}

fn wait(process: &str) -> Input {
    Input::Wait { process: process.into() }
}

fn perished(journal: &[(&str, Exit)], killed: Option<Exit>) -> Input {
    let journal = journal.iter().map(|(id, exit)| ((*id).to_owned(), *exit, Cause::None)).collect();
    Input::Perished { journal, running: Vec::new(), killed, now: NOW }
}

/// What follows from the end of a cleaning.
fn cleaned_up(machine: &mut Machine, journal: &[(&str, Exit)], killed: Option<Exit>) -> Vec<Action> {
    let mut actions = machine.apply(perished(journal, killed));
    assert_eq!(machine.phase(), Phase::Cleaning, "what is told twice is better than what is not told");
    actions.extend(machine.apply(Input::CleanedUp));
    actions
}

fn exec_running(machine: &mut Machine, id: &str, pid: u32) {
    machine.apply(Input::ExecAdded { process: id.into() });
    machine.apply(Input::Started { process: id.into(), pid });
}

#[test]
fn a_life_without_incidents_publishes_nothing() {
    let mut machine = live();
    assert_eq!((machine.phase(), machine.pid()), (Phase::Live, 10));
    assert_eq!(machine.apply(wait("c")), [Action::AskWait("c".into())]);
    assert_eq!(machine.apply(wait("c")), [], "one wait at the shim serves all");
    machine.apply(Input::Exited { process: "c".into(), exit: exit(10, 0) });
    assert_eq!(machine.apply(Input::WaitOver { process: "c".into(), lost: false }), []);
    assert_eq!(machine.apply(Input::Delete), [Action::Delete]);
    assert_eq!(machine.apply(Input::Delete), [], "one deletion serves all");
    assert_eq!(machine.apply(Input::DeletePublished), []);
    assert_eq!(
        machine.apply(Input::Deleted { exit: Some(exit(10, 0)) }),
        [Action::AnswerDelete(Some(exit(10, 0))), Action::Leave]
    );
    assert_eq!(machine.apply(Input::Disconnected), []);
    assert_eq!(machine.phase(), Phase::Gone);
}

#[test]
fn what_is_being_created_does_not_exist_yet() {
    let mut machine = Machine::creating("c");
    assert_eq!(machine.apply(Input::Delete), [Action::RefuseDelete(Refusal::NotFound)]);
    assert_eq!(machine.apply(wait("c")), [Action::RefuseWait("c".into())]);
    assert_eq!(machine.apply(Input::CreateFailed), [Action::Leave]);
}

#[test]
fn a_refused_deletion_changes_nothing() {
    let mut machine = live();
    machine.apply(Input::Delete);
    assert_eq!(machine.apply(Input::DeleteRefused), [Action::RefuseDelete(Refusal::Shim)]);
    assert_eq!(machine.phase(), Phase::Live);
    assert_eq!(machine.apply(Input::Delete), [Action::Delete]);
}

#[test]
fn a_shim_that_dies_is_reported_with_what_the_journal_holds() {
    let mut machine = live();
    exec_running(&mut machine, "e1", 11);
    exec_running(&mut machine, "e2", 12);
    exec_running(&mut machine, "e3", 13);
    machine.apply(Input::ExecAdded { process: "never-started".into() });
    machine.apply(Input::Exited { process: "e1".into(), exit: exit(11, 1) });
    assert_eq!(machine.apply(wait("e3")), [Action::AskWait("e3".into())]);
    assert_eq!(machine.apply(Input::Disconnected), [Action::CleanUp]);
    assert_eq!(machine.apply(wait("c")), [], "whoever waits now is answered at the end");
    let journal = [("c", exit(10, 7)), ("e1", exit(11, 1)), ("e2", exit(12, 2))];
    let killed = Exit { pid: 13, status: KILLED, exited_at: Some(NOW) };
    assert_eq!(
        cleaned_up(&mut machine, &journal, Some(exit(10, 137))),
        [
            Action::PublishExit("e2".into(), exit(12, 2), Cause::None),
            Action::PublishExit("e3".into(), killed, Cause::ShimKilled),
            Action::PublishExit("c".into(), exit(10, 7), Cause::None),
            Action::PublishDelete(exit(10, 7)),
            Action::AnswerWait("c".into(), exit(10, 7)),
            Action::AnswerWait("e3".into(), killed),
            Action::AnswerDelete(Some(exit(10, 7))),
            Action::Leave,
        ]
    );
}

#[test]
fn exits_are_published_in_their_order() {
    let mut machine = live();
    machine.apply(Input::Disconnected);
    let journal = [("z", exit(1, 0)), ("a", exit(2, 0)), ("c", exit(10, 0)), ("m", exit(3, 0))];
    let actions = machine.apply(perished(&journal, None));
    let published = actions.iter().filter_map(|action| match action {
        Action::PublishExit(process, ..) => Some(process.as_str()),
        _ => None,
    });
    assert_eq!(published.collect::<Vec<_>>(), ["z", "a", "m", "c"], "init is last, as a shim publishes it");
}

#[test]
fn an_exec_of_an_earlier_daemons_time_dies_with_its_shim_too() {
    let mut machine = Machine::loading("c");
    machine.apply(Input::Found { pid: 10, exit: None });
    machine.apply(Input::Disconnected);
    let running = vec![("c".to_owned(), 10), ("e".to_owned(), 11)];
    let actions = machine.apply(Input::Perished { journal: Vec::new(), running, killed: None, now: NOW });
    let killed = |pid| Exit { pid, status: KILLED, exited_at: Some(NOW) };
    assert_eq!(
        actions[..2],
        [
            Action::PublishExit("e".into(), killed(11), Cause::ShimKilled),
            Action::PublishExit("c".into(), killed(10), Cause::ShimKilled),
        ]
    );
}

#[test]
fn a_death_that_nobody_recorded_is_137() {
    let mut machine = live();
    machine.apply(Input::Disconnected);
    let killed = Exit { pid: 10, status: KILLED, exited_at: Some(NOW) };
    let actions = cleaned_up(&mut machine, &[], None);
    assert_eq!(actions[0], Action::PublishExit("c".into(), killed, Cause::ShimKilled));
    // `shim delete` may know less of the process than we do.
    let mut machine = live();
    machine.apply(Input::Disconnected);
    let told = Exit { pid: 0, status: 137, exited_at: None };
    let actions = cleaned_up(&mut machine, &[], Some(told));
    assert_eq!(actions[0], Action::PublishExit("c".into(), killed, Cause::ShimKilled));
}

#[test]
fn what_the_shim_has_published_is_not_published_again() {
    let mut machine = live();
    machine.apply(Input::Exited { process: "c".into(), exit: exit(10, 3) });
    machine.apply(Input::Delete);
    machine.apply(Input::DeletePublished);
    assert_eq!(machine.apply(Input::DeleteLost), [Action::CleanUp]);
    assert_eq!(
        cleaned_up(&mut machine, &[("c", exit(10, 3))], Some(exit(10, 137))),
        [Action::AnswerDelete(Some(exit(10, 3))), Action::Leave]
    );
}

#[test]
fn a_connection_that_is_lost_while_the_shim_lives_is_taken_up_again() {
    let mut machine = live();
    machine.apply(wait("c"));
    machine.apply(Input::Disconnected);
    machine.apply(Input::WaitOver { process: "c".into(), lost: true });
    assert_eq!(machine.apply(Input::Found { pid: 10, exit: None }), [Action::AskWait("c".into())]);
    assert_eq!(machine.phase(), Phase::Live);
}

#[test]
fn the_shim_may_die_before_its_creation_is_reported() {
    let mut machine = Machine::creating("c");
    assert_eq!(machine.apply(Input::Disconnected), []);
    assert_eq!(machine.apply(Input::Created { pid: 10 }), [Action::CleanUp]);
}

#[test]
fn silence_is_not_death() {
    let mut machine = Machine::loading("c");
    assert_eq!(machine.apply(wait("c")), []);
    assert_eq!(machine.apply(Input::Delete), []);
    assert_eq!(machine.apply(Input::Silent { pid: 10 }), [Action::RefuseDelete(Refusal::Unreachable)]);
    assert_eq!((machine.phase(), machine.pid()), (Phase::Unreachable, 10));
    assert_eq!(machine.apply(Input::Found { pid: 10, exit: None }), [Action::AskWait("c".into())]);
    assert_eq!(machine.phase(), Phase::Live);
}

#[test]
fn a_deletion_that_was_wanted_while_loading_is_done() {
    let mut machine = Machine::loading("c");
    machine.apply(Input::Delete);
    assert_eq!(machine.apply(Input::Found { pid: 10, exit: None }), [Action::Delete]);
}

#[test]
fn a_deletion_that_lost_its_connection_is_asked_for_again() {
    let mut machine = live();
    machine.apply(Input::Delete);
    machine.apply(Input::DeleteLost);
    assert_eq!(machine.apply(Input::Found { pid: 10, exit: None }), [Action::Delete]);
}

#[test]
fn an_exit_that_was_published_before_is_not_published_when_the_shim_dies() {
    let mut machine = Machine::loading("c");
    machine.apply(Input::Exited { process: "c".into(), exit: exit(10, 3) });
    machine.apply(Input::Found { pid: 10, exit: None });
    machine.apply(Input::Disconnected);
    let actions = cleaned_up(&mut machine, &[], Some(exit(10, 137)));
    assert_eq!(actions[0], Action::PublishDelete(exit(10, 3)));

    let mut machine = Machine::loading("c");
    machine.apply(Input::Found { pid: 10, exit: Some(exit(10, 3)) });
    machine.apply(Input::Disconnected);
    let actions = cleaned_up(&mut machine, &[], Some(exit(10, 137)));
    assert_eq!(actions[0], Action::PublishDelete(exit(10, 3)));
}

#[test]
fn a_bundle_that_never_had_a_process_reports_none() {
    let mut machine = Machine::loading("c");
    assert_eq!(machine.apply(Input::Dead { pid: 0 }), [Action::CleanUp]);
    assert_eq!(
        cleaned_up(&mut machine, &[], Some(exit(0, 137))),
        [Action::AnswerDelete(None), Action::Leave]
    );
}

#[test]
fn a_task_whose_shim_died_with_the_daemon_is_reported() {
    let mut machine = Machine::loading("c");
    machine.apply(Input::Dead { pid: 10 });
    let actions = cleaned_up(&mut machine, &[], Some(exit(10, 137)));
    assert_eq!(actions[0], Action::PublishExit("c".into(), exit(10, 137), Cause::ShimKilled));
    assert_eq!(actions[1], Action::PublishDelete(exit(10, 137)));
}

#[test]
fn the_wait_for_a_deleted_exec_is_answered() {
    let mut machine = live();
    exec_running(&mut machine, "e", 11);
    machine.apply(wait("e"));
    let deleted = |exit| Input::ExecDeleted { process: "e".into(), exit };
    assert_eq!(machine.apply(deleted(exit(11, 4))), [Action::AnswerWait("e".into(), exit(11, 4))]);
    machine.apply(Input::ExecAdded { process: "e".into() });
    machine.apply(wait("e"));
    let never_ran = Exit { pid: 0, status: 0, exited_at: None };
    assert_eq!(machine.apply(deleted(never_ran)), [Action::RefuseWait("e".into())]);
}

#[test]
fn a_late_exit_of_a_deleted_exec_leaves_no_trace() {
    let mut machine = live();
    exec_running(&mut machine, "e", 11);
    machine.apply(Input::ExecDeleted { process: "e".into(), exit: exit(11, 0) });
    machine.apply(Input::Exited { process: "e".into(), exit: exit(11, 0) });
    assert_eq!(machine.processes.len(), 1);
    // Nor is it taken for the exit of a later exec of the same name.
    exec_running(&mut machine, "e", 12);
    machine.apply(Input::Exited { process: "e".into(), exit: exit(11, 0) });
    assert_eq!(machine.processes["e"].exit, None);
}

fn any_input() -> impl Strategy<Value = Input> {
    let process = prop_oneof![Just("c".to_owned()), Just("e".to_owned())];
    let pid = 0u32..3;
    prop_oneof![
        pid.clone().prop_map(|pid| Input::Created { pid }),
        Just(Input::CreateFailed),
        (pid.clone(), any::<bool>())
            .prop_map(|(pid, ended)| Input::Found { pid, exit: ended.then(|| exit(pid, 0)) }),
        pid.clone().prop_map(|pid| Input::Dead { pid }),
        pid.clone().prop_map(|pid| Input::Silent { pid }),
        Just(Input::Disconnected),
        Just(Input::Delete),
        Just(Input::DeleteRefused),
        Just(Input::DeleteLost),
        pid.clone().prop_map(|pid| Input::Deleted { exit: (pid > 0).then(|| exit(pid, 0)) }),
        (process.clone(), pid.clone()).prop_map(|(id, pid)| perished(&[(&id, exit(pid, 1))], None)),
        Just(Input::CleanedUp),
        (process.clone(), pid.clone()).prop_map(|(process, pid)| Input::Started { process, pid }),
        Just(Input::ExecAdded { process: "e".into() }),
        pid.clone().prop_map(|pid| Input::ExecDeleted { process: "e".into(), exit: exit(pid, 0) }),
        (process.clone(), pid).prop_map(|(process, pid)| Input::Exited { process, exit: exit(pid, 0) }),
        Just(Input::DeletePublished),
        process.clone().prop_map(|process| Input::Wait { process }),
        (process, any::<bool>()).prop_map(|(process, lost)| Input::WaitOver { process, lost }),
    ]
}

proptest! {
    /// Whatever happens in whatever order: it leaves once, nothing is asked of a task that is gone, an
    /// exit is published once, and nobody is left waiting.
    #[test]
    fn no_order_of_events_breaks_the_invariants(
        loading in any::<bool>(),
        inputs in proptest::collection::vec(any_input(), 0..60),
    ) {
        let mut machine = if loading { Machine::loading("c") } else { Machine::creating("c") };
        let (mut waiting, mut deletes, mut left) = (std::collections::BTreeSet::new(), 0usize, 0);
        let mut published = std::collections::BTreeSet::new();
        for input in inputs {
            match &input {
                Input::Wait { process } => { waiting.insert(process.clone()); }
                // The owner answers these itself.
                Input::WaitOver { process, lost: false } => { waiting.remove(process); }
                Input::Delete => deletes += 1,
                Input::ExecAdded { process } | Input::ExecDeleted { process, .. } => {
                    published.remove(process);
                }
                _ => {}
            }
            let before = machine.phase();
            let to_cleaning = matches!(
                input,
                Input::Disconnected | Input::Dead { .. } | Input::DeleteLost | Input::Created { .. }
                    | Input::DeleteRefused
            );
            let actions = machine.apply(input);
            if machine.phase() == Phase::Cleaning && before != Phase::Cleaning {
                prop_assert!(to_cleaning, "only the end of a connection or a refusal means death");
            }
            for action in actions {
                match action {
                    Action::AnswerWait(process, _) | Action::RefuseWait(process) => {
                        waiting.remove(&process);
                    }
                    Action::AnswerDelete(_) | Action::RefuseDelete(_) => deletes = 0,
                    Action::PublishExit(process, ..) => {
                        prop_assert!(published.insert(process), "published twice");
                    }
                    Action::Leave => left += 1,
                    Action::Delete | Action::CleanUp | Action::AskWait(_) => {
                        prop_assert!(before != Phase::Gone);
                    }
                    Action::PublishDelete(_) => {
                        prop_assert!(before == Phase::Cleaning && machine.phase() == Phase::Cleaning);
                    }
                }
            }
            if machine.phase() == Phase::Gone {
                prop_assert!(left == 1 && waiting.is_empty() && deletes == 0);
            }
        }
    }
}
