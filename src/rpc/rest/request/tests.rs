use serde_json::json;
use tonic::codegen::http::Method;

use super::*;
use crate::rpc::pb;
use crate::rpc::rest::routes::{Lookup, PathPart, Template, find, table};

/// Returns the parts of a request without a body.
fn parts(verb: Method, target: &str) -> RequestParts {
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let Lookup::Route(route, parts) = find(table().unwrap(), &verb, path) else {
        panic!("{verb} {path} has no route")
    };
    RequestParts {
        route,
        bindings: route.template.bindings(&parts).unwrap(),
        query: query.to_owned(),
        last_event_id: None,
        is_json: true,
        limit: 1 << 20,
        timeout: BODY_TIMEOUT,
    }
}

/// Returns the message of a request.
fn read_as<M: prost::Message + Default>(parts: &RequestParts, body: &str) -> M {
    let framed = message(parts, body.as_bytes()).unwrap();
    assert_eq!(framed[0], 0);
    assert_eq!(
        u32::from_be_bytes(framed[1..5].try_into().unwrap()) as usize,
        framed.len() - 5
    );
    M::decode(&framed[5..]).unwrap()
}

/// Returns the violations of a refused request.
fn refused(parts: &RequestParts, body: &str) -> Vec<(String, String)> {
    match message(parts, body.as_bytes()) {
        Err(ServiceError::InvalidArgument(v)) => v
            .listed()
            .iter()
            .map(|v| (v.field.clone(), v.description.clone()))
            .collect(),
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn templates_are_read_and_matched() {
    let template = Template::parse("/v1/{name=trainingJobs/*/checkpoints/*}:export").unwrap();
    assert_eq!(template.custom_verb.as_deref(), Some("export"));
    assert_eq!(template.parts.len(), 5);
    assert_eq!(template.parts[2], PathPart::Any);
    let path = "/v1/trainingJobs/a%20b/checkpoints/latest:export";
    let parts = template.match_path(path).unwrap();
    let expected = (
        "name".to_owned(),
        "trainingJobs/a b/checkpoints/latest".to_owned(),
    );
    assert_eq!(template.bindings(&parts), Some(vec![expected]));
    // An encoded slash does not end a part.
    let path = "/v1/trainingJobs/a%2fb/checkpoints/c:export";
    let parts = template.match_path(path).unwrap();
    let bound = template.bindings(&parts).unwrap().remove(0).1;
    assert_eq!(bound, "trainingJobs/a%2Fb/checkpoints/c");
    for other in [
        "",
        "/",
        "/v1/trainingJobs/a/checkpoints/c",
        "/v1/trainingJobs/a/checkpoints/c:exports",
        "/v1/trainingJobs//checkpoints/c:export",
        "/v1/trainingJobs/a/checkpoints/c/:export",
        "//v1/trainingJobs/a/checkpoints/c:export",
    ] {
        assert_eq!(template.match_path(other), None, "{other}");
    }
    let parts = template
        .match_path("/v1/trainingJobs/%ff/checkpoints/c:export")
        .unwrap();
    assert_eq!(template.bindings(&parts), None, "not UTF-8");
    for wrong in [
        "",
        "v1",
        "/v1//x",
        "/v1/{name",
        "/v1/{name=**}",
        "/v1/{a}x",
        "/v1/a b",
    ] {
        assert_eq!(Template::parse(wrong), None, "{wrong}");
    }
}

#[test]
fn a_custom_verb_is_no_part_of_a_name() {
    let table = table().unwrap();
    let path = "/v1/trainingJobs/x:pause";
    let Lookup::OtherVerbs(verbs) = find(table, &Method::GET, path) else {
        panic!("GET of {path} is a route")
    };
    assert_eq!(verbs, [&Method::POST]);
    let Lookup::OtherVerbs(verbs) = find(table, &Method::PUT, "/v1/trainingJobs/x") else {
        panic!("PUT is a route")
    };
    assert_eq!(verbs.len(), 3, "{verbs:?}");
    assert!(matches!(
        find(table, &Method::GET, "/v1/trainingJobs/"),
        Lookup::NoPath
    ));
}

#[test]
fn parameters_fill_fields_of_every_kind() {
    let request: pb::ListTrainingJobsRequest = read_as(
        &parts(
            Method::GET,
            "/v1/trainingJobs?states=JOB_STATE_QUEUED&states=running&states=4&page_size=7\
             &pageToken=a%26b+c",
        ),
        "",
    );
    assert_eq!(
        request.states,
        [
            pb::JobState::Queued,
            pb::JobState::Running,
            pb::JobState::Cancelling
        ]
        .map(i32::from)
    );
    assert_eq!(
        (request.page_size, request.page_token.as_str()),
        (7, "a&b c")
    );

    let update = parts(
        Method::PATCH,
        "/v1/trainingJobs/x?update_mask=display_name,labels",
    );
    let request: pb::UpdateTrainingJobRequest = read_as(
        &update,
        r#"{"displayName": "t", "ttl": "90s", "labels": {"a": "b"}}"#,
    );
    let job = request.training_job.unwrap();
    assert_eq!(
        (job.name.as_str(), job.display_name.as_str()),
        ("trainingJobs/x", "t")
    );
    assert_eq!(job.ttl.unwrap().seconds, 90);
    assert_eq!(
        request.update_mask.unwrap().paths,
        ["display_name", "labels"]
    );
}

#[test]
fn the_path_and_the_body_must_agree() {
    let update = parts(Method::PATCH, "/v1/trainingJobs/x");
    let _: pb::UpdateTrainingJobRequest = read_as(&update, r#"{"name": "trainingJobs/x"}"#);
    let _: pb::UpdateTrainingJobRequest = read_as(&update, r#"{"name": null}"#);
    for other in [r#"{"name": "trainingJobs/y"}"#, r#"{"name": 7}"#] {
        let wrong = refused(&update, other);
        assert_eq!(wrong[0].0, "training_job.name", "{other}");
        let says = "in the body and \"trainingJobs/x\" in the path";
        assert!(wrong[0].1.ends_with(says), "{other}: {wrong:?}");
    }
    let pause = parts(Method::POST, "/v1/trainingJobs/x:pause");
    let request: pb::PauseTrainingJobRequest = read_as(&pause, "");
    assert_eq!(request.name, "trainingJobs/x");
    let _: pb::PauseTrainingJobRequest = read_as(&pause, "{}");
}

#[test]
fn every_wrong_parameter_is_reported() {
    let list = "/v1/trainingJobs?page_sise=1&states=gone&page_size=x";
    let wrong = refused(&parts(Method::GET, list), "");
    assert_eq!(wrong[0].0, "page_sise");
    assert!(wrong[0].1.contains("did you mean page_size"), "{wrong:?}");
    for (target, field, text) in [
        (
            "/v1/trainingJobs?page_size=x&page_size=1",
            "page_size",
            "twice",
        ),
        ("/v1/trainingJobs?page_size=x", "page_size", "whole number"),
        (
            "/v1/trainingJobs?page_size.x=1",
            "page_size.x",
            "has no fields",
        ),
        ("/v1/trainingJobs/x?name=y", "name", "part of the path"),
        (
            "/v1/trainingJobs?states=gone",
            "states[0]",
            "must be one of",
        ),
    ] {
        let wrong = refused(&parts(Method::GET, target), "");
        assert_eq!(wrong[0].0, field, "{target}: {wrong:?}");
        assert!(wrong[0].1.contains(text), "{target}: {wrong:?}");
    }
    let create = parts(
        Method::POST,
        "/v1/trainingJobs?training_job.seed=1&request_id=r",
    );
    assert!(refused(&create, "{}")[0].1.contains("body"));
    let score = parts(Method::POST, "/v1/scoring:scorePairs?x=1");
    assert!(refused(&score, "{}")[0].1.contains("in the body"));
    let wrong = refused(
        &parts(Method::POST, "/v1/trainingJobs"),
        r#"{"sead": 1, "seed": -1}"#,
    );
    let fields: Vec<&str> = wrong.iter().map(|(field, _)| field.as_str()).collect();
    assert_eq!(fields, ["training_job.sead", "training_job.seed"]);
    for body in ["[]", "1", "null", "{", "\u{0}"] {
        refused(&parts(Method::POST, "/v1/scoring:scorePairs"), body);
    }
}

#[test]
fn the_last_event_id_replaces_the_cursor() {
    let mut stream = parts(
        Method::GET,
        "/v1/trainingJobs/x/events:stream?after_sequence=3&tail=5",
    );
    let request: pb::StreamTrainingEventsRequest = read_as(&stream, "");
    assert_eq!((request.after_sequence, request.tail), (3, 5));
    stream.last_event_id = Some("17".into());
    let request: pb::StreamTrainingEventsRequest = read_as(&stream, "");
    assert_eq!((request.after_sequence, request.tail), (17, 0));
    stream.last_event_id = Some("x".into());
    assert_eq!(refused(&stream, "")[0].0, "after_sequence");
}

/// A body that never comes.
struct Silent;

impl http_body::Body for Silent {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        Poll::Pending
    }
}

#[tokio::test]
async fn a_body_that_does_not_come_ends_the_call() {
    let mut score = parts(Method::POST, "/v1/scoring:scorePairs");
    score.timeout = Duration::from_millis(5);
    let mut body = Body::new(LateBody::new(score, Body::new(Silent)));
    let refused = next_frame(&mut body).await.unwrap().unwrap_err();
    assert_eq!(refused.metadata().get(HTTP_STATUS).unwrap(), "408");
    assert!(next_frame(&mut body).await.is_none());
}

#[test]
fn a_body_of_very_many_values_is_refused() {
    let score = parts(Method::POST, "/v1/scoring:scorePairs");
    let values = format!("{{\"pairs\": [{}0]}}", "0,".repeat(MAX_VALUES));
    assert!(refused(&score, &values)[0].1.contains("values"));
    // The same characters in a string are one value.
    let text = json!({"options": {"policy": "0,\"\\".repeat(MAX_VALUES)}}).to_string();
    assert!(!has_too_many_values(text.as_bytes()));
    let nested = "[".repeat(500);
    assert!(refused(&score, &nested)[0].1.contains("recursion"));
}
