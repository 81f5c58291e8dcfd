//! Reports as people and programs read them.

use super::*;

#[test]
fn lines_are_aligned_and_hints_stand_below() {
    let findings = vec![
        Finding::ok("cgroups", "version", "v2"),
        Finding::warn("kernel", "swap accounting", "no\nreally", "boot with swapaccount=1"),
        Finding::missing("cni", "network", "none", "write one"),
    ];
    let report = Report { ready: false, findings };
    assert_eq!(
        report.to_string(),
        "ok       cgroups version         v2\n\
         warn     kernel swap accounting  no really\n                                 -> boot with swapaccount=1\n\
         MISSING  cni network             none\n                                 -> write one\n\
         \nnot ready: 1 missing, 1 warnings\n"
    );
}

#[test]
fn programs_get_words_in_lower_case_and_no_empty_members() {
    let ok = serde_json::to_value(Finding::ok("a", "b", "c")).unwrap();
    assert_eq!(ok, serde_json::json!({"topic": "a", "name": "b", "state": "ok", "found": "c"}));
    let missing = serde_json::to_value(Finding::missing("a", "b", "c", "d").with(serde_json::json!([1]))).unwrap();
    assert_eq!(missing, serde_json::json!({"topic": "a", "name": "b", "state": "missing", "found": "c", "hint": "d", "data": [1]}));
}

#[test]
fn the_nearest_directory() {
    assert_eq!(nearest(Path::new("/proc/no/such")), Path::new("/proc"));
    assert_eq!(nearest(Path::new("/")), Path::new("/"));
}
