use std::time::Instant;

use davit_model::error::chain;

use super::*;

const SECRET: &str = "application/x.secret";

fn shell(accepts: &str, returns: &str, script: &str) -> StreamProcessor {
    StreamProcessor {
        accepts: vec![accepts.to_owned()],
        returns: returns.to_owned(),
        path: "sh".into(),
        args: vec!["-c".to_owned(), script.to_owned()],
        env: vec!["KEY=value=with=signs".to_owned()],
    }
}

fn processors(list: &[(&str, StreamProcessor)]) -> Processors {
    Processors::new(&list.iter().map(|(id, processor)| ((*id).to_owned(), processor.clone())).collect())
}

/// What comes out, and its type, or why nothing does.
fn process(
    list: &[(&str, StreamProcessor)],
    input: &[u8],
    payloads: &BTreeMap<String, Any>,
) -> Result<(String, String), Error> {
    let running = Arc::new(Running::default());
    let _guard = Guard(running.clone());
    let input = std::io::Cursor::new(input.to_vec());
    let (mut reader, returned) = processors(list).start(input, SECRET, payloads, &running)?;
    let mut output = String::new();
    match reader.read_to_string(&mut output) {
        Ok(_) => assert!(running.failure().is_none()),
        Err(error) => return Err(running.failure().unwrap_or_else(|| panic!("{error}"))),
    }
    Ok((output, returned))
}

#[test]
fn a_layer_goes_through_all_programs_for_its_type() {
    let list = [
        ("1", shell(SECRET, "application/x.other", "false")),
        ("2", shell(SECRET, "application/x.half", "tr a-z n-za-m; printf \" $KEY\"")),
        ("3", shell("application/x.half", PLAIN, "cat; printf \" $STREAM_PROCESSOR_MEDIATYPE\"")),
        // Nothing more is asked of a plain layer.
        ("4", shell(PLAIN, PLAIN, "false")),
    ];
    let (output, returned) = process(&list, b"hello", &BTreeMap::new()).unwrap();
    assert_eq!(output, "uryyb value=with=signs application/x.half");
    assert_eq!(returned, PLAIN);
    // More than pipes hold, through programs of which one does not read all.
    let list = [
        ("1", shell(SECRET, "application/x.half", "cat")),
        ("2", shell("application/x.half", PLAIN, "head -c 3")),
    ];
    let (output, _) = process(&list, &vec![b'x'; 4 << 20], &BTreeMap::new()).unwrap();
    assert_eq!(output, "xxx");
}

#[test]
fn a_payload_is_the_fourth_descriptor_and_no_other_is_inherited() {
    let script = "cat <&3; ls /proc/self/fd | tr '\\n' ' '";
    let payload = Any { type_url: "t".into(), value: b"key".to_vec() };
    let payloads = BTreeMap::from([("1".to_owned(), payload.clone()), ("x".to_owned(), Any::default())]);
    let (output, _) = process(&[("1", shell(SECRET, PLAIN, script))], b"", &payloads).unwrap();
    // The last is the one by which `ls` reads the folder.
    assert_eq!(output, "\n\u{1}t\u{12}\u{3}key0 1 2 3 4 ");
}

#[test]
fn a_program_that_fails_spoils_the_layer() {
    let fails = shell(SECRET, "application/x.half", "cat; echo wrong key >&2; exit 3");
    let error = process(&[("a", fails.clone())], b"x", &BTreeMap::new()).unwrap_err();
    assert_eq!(chain(&error), "stream processor \"a\" ended with 3: wrong key");
    // Also if the next one is content with what it got.
    let list = [("a", fails), ("b", shell("application/x.half", PLAIN, "cat"))];
    let error = process(&list, b"x", &BTreeMap::new()).unwrap_err();
    assert!(chain(&error).contains("wrong key"), "{error}");
    let absent = StreamProcessor { path: "no-such-program".into(), ..shell(SECRET, PLAIN, "") };
    let error = process(&[("a", absent)], b"x", &BTreeMap::new()).unwrap_err();
    assert_eq!(error.code(), ErrorCode::FailedPrecondition);
    let circle = shell(SECRET, SECRET, "cat");
    let error = process(&[("a", circle)], b"x", &BTreeMap::new()).unwrap_err();
    assert_eq!(error.code(), ErrorCode::InvalidArgument);
    // Of what it says the end counts.
    let speaks = shell(SECRET, PLAIN, "yes | head -c 1000000 >&2; echo the end >&2; exit 1");
    let text = process(&[("a", speaks)], b"x", &BTreeMap::new()).unwrap_err().to_string();
    assert!(text.ends_with("the end") && text.len() < 4096, "{text}");
}

#[test]
fn a_program_that_says_nothing_or_does_not_end_is_killed() {
    for (script, words) in [
        ("echo why >&2; exec sleep 1000", "said nothing within 5 seconds: why"),
        ("echo why >&2; exec >&-; sleep 1000", "did not end within 5 seconds: why"),
    ] {
        // Time enough to say why also where all is slow.
        let limit = Duration::from_secs(5);
        let running = Arc::new(Running { stall: limit, exit: limit, ..Running::default() });
        let list = processors(&[("a", shell(SECRET, PLAIN, script))]);
        let (mut reader, _) = list.start(std::io::empty(), SECRET, &BTreeMap::new(), &running).unwrap();
        let error = reader.read(&mut [0]).unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
        drop(reader);
        let failure = running.failure().unwrap();
        assert_eq!(failure.code(), ErrorCode::DeadlineExceeded);
        assert!(running.lock().leaders.is_empty(), "it is reaped");
    }
}

#[test]
fn what_a_program_leaves_behind_is_not_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    // A session of its own, which has the input and does not read it. It ends with the folder.
    let script = format!(
        "cd {}; exec 5<&0; setsid sh -c 'touch begun; while [ -e begun ]; do sleep 0.01; done' <&5 >/dev/null 2>&1 &\n\
         while [ ! -e begun ]; do sleep 0.01; done",
        folder.path().display()
    );
    let running = Arc::new(Running { stall: Duration::from_secs(5), ..Running::default() });
    let list = processors(&[("a", shell(SECRET, PLAIN, &script))]);
    let input = std::io::Cursor::new(vec![0; 1 << 20]);
    let (mut reader, _) = list.start(input, SECRET, &BTreeMap::new(), &running).unwrap();
    let error = reader.read(&mut [0]).unwrap_err();
    assert!(error.to_string().contains("did not let go of its input within 5 seconds"), "{error}");
}

#[test]
fn what_is_given_up_is_killed_with_all_that_it_started() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pids");
    // One child more, and neither takes note of the end of its input.
    let script = format!("sleep 1000 & echo $! $$ > {0}.new; mv {0}.new {0}; sleep 1000", path.display());
    let running = Arc::new(Running::default());
    let list = processors(&[("a", shell(SECRET, PLAIN, &script))]);
    let (mut reader, _) = list.start(std::io::empty(), SECRET, &BTreeMap::new(), &running).unwrap();
    let begun = Instant::now();
    let pids = loop {
        if let Ok(text) = std::fs::read_to_string(&path) {
            break text;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "the script does not start");
        std::thread::yield_now();
    };
    drop(Guard(running.clone()));
    let error = reader.read(&mut [0]).unwrap_err();
    assert!(error.to_string().contains("ended with 137"), "{error}");
    drop(reader);
    assert!(
        list.start(std::io::empty(), SECRET, &BTreeMap::new(), &running)
            .is_err_and(|error| matches!(error, Error::Canceled))
    );
    for pid in pids.split_whitespace() {
        // An orphan may be a zombie until its new parent looks.
        let state = || std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        while !state().is_empty() && !state().contains(") Z ") {
            assert!(begun.elapsed() < Duration::from_secs(60), "{pid} lives: {}", state());
            std::thread::yield_now();
        }
    }
}
