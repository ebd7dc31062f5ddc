//! Compares renderings with those of jinja2 3.1.6 under Python 3.11 for the same templates.

use serde_json::{Map, json};

use super::rewrite;
use crate::formats::chat_template::{ChatTemplate, RenderOptions};

/// Renders a template with the variable `x`.
fn render(source: &str) -> Result<String, String> {
    let kwargs = Map::from_iter([("x".to_owned(), json!({"y": 3}))]);
    let options = RenderOptions {
        kwargs: &kwargs,
        ..RenderOptions::new(false)
    };
    let template = ChatTemplate::new(source, vec![]).map_err(|e| e.to_string())?;
    template.render(&[], &options).map_err(|e| e.to_string())
}

#[test]
fn strings_are_formatted_as_in_python() {
    let cases = [
        ("'%s' % 'a'", "a"),
        ("'%s %s' % ('a', 1)", "a 1"),
        ("'%s' % none", "None"),
        ("'%s' % true", "True"),
        ("'%s' % undef", ""),
        ("'%s' % [1, 'a', none]", "[1, 'a', None]"),
        ("'%s' % {'a': 1.0}", "{'a': 1.0}"),
        ("'%s' % 1e16", "1e+16"),
        ("'%s' % ((1, 'a'),)", "(1, 'a')"),
        ("'%(a)s-%(b)03d' % {'a': 'x', 'b': 7}", "x-007"),
        ("'%s %(a)s' % {'a': 1}", "{'a': 1} 1"),
        (r#"'%r %r %r' % ('a', "it's", 1.0)"#, r#"'a' "it's" 1.0"#),
        ("'%r' % undef", "Undefined"),
        (
            "'%5s|%-5s|%.2s|%5.1s|%05s' % ('ab', 'ab', 'abc', 'xyz', 'ab')",
            "   ab|ab   |ab|    x|   ab",
        ),
        ("'%d %i %u' % (1, -2, 3)", "1 -2 3"),
        ("'%d %d %d' % (3.99, -3.99, true)", "3 -3 1"),
        ("'%d' % 1e20", "100000000000000000000"),
        (
            "'%d' % 170141183460469231731687303715884105727",
            "170141183460469231731687303715884105727",
        ),
        (
            "'%03d|%-4d|%4d|%+d|% d|%+d' % (7, 7, 7, 7, 7, -7)",
            "007|7   |   7|+7| 7|-7",
        ),
        (
            "'%.3d|%05.3d|%-05d|%+05d|%+ d' % (7, 7, 7, 7, 7)",
            "007|00007|7    |+0007|+7",
        ),
        (
            "'%f %.2f %.0f %.0f %#.0f' % (1, 2.675, 0.5, 1.5, 2)",
            "1.000000 2.67 0 2 2.",
        ),
        (
            "'%08.3f|%+.1f|%-8.2f|% .1f' % (-3.14159, 2, 1.005, 1)",
            "-003.142|+2.0|1.00    | 1.0",
        ),
        ("'%.1f' % 0.25", "0.2"),
        ("'%.20f' % 0.1", "0.10000000000000000555"),
        ("'%f' % -0.0", "-0.000000"),
        ("'%f %F' % (1e999, 1e999)", "inf INF"),
        ("'%05f' % 1e999", "00inf"),
        (
            "'%x %X %#x %#X %o %#o %04x' % (255, 255, 255, 255, 8, 8, 255)",
            "ff FF 0xff 0XFF 10 0o10 00ff",
        ),
        ("'%#06x|%x|%.4x' % (255, -255, 255)", "0x00ff|-ff|00ff"),
        (
            "'%e %.2e %E %.0e %#.0e' % (1234.5, 0.00012345, 1, 5, 5)",
            "1.234500e+03 1.23e-04 1.000000E+00 5e+00 5.e+00",
        ),
        (
            "'%g %g %g %g %g' % (100000, 1000000, 0.0001, 0.00001234, 0)",
            "100000 1e+06 0.0001 1.234e-05 0",
        ),
        (
            "'%.3g|%#.3g|%10.2g|%-10.2g|%+g|%010.3g' % (1234.5, 1.0, 3.14159, 2.5, 7, -0.5)",
            "1.23e+03|1.00|       3.1|2.5       |+7|-0000000.5",
        ),
        (
            "'%G %E %g' % (1e-10, 1e100, 1e999)",
            "1E-10 1.000000E+100 inf",
        ),
        (
            "'%.0g %g %g' % (2.5, 123456, 1234567)",
            "2 123456 1.23457e+06",
        ),
        ("'%.17g' % 0.1", "0.10000000000000001"),
        ("'%e' % 0", "0.000000e+00"),
        ("'%c%c' % (65, 'é')", "Aé"),
        ("'%3c|%-3c|' % ('a', 'b')", "  a|b  |"),
        ("'%d%%' % 5", "5%"),
        ("'100%%' % ()", "100%"),
        ("'abc' % []", "abc"),
        ("'abc' % {}", "abc"),
        ("'%ld' % 5", "5"),
        ("'%s' % 'a' ~ 'b'", "ab"),
        ("'%s' % [1, 2][0]", "1"),
        ("'%s' % {'a': {'b': 2}}.a.b", "2"),
        ("'%s' % 'ab' | upper", "AB"),
        ("'%s' % -3", "-3"),
        ("'%d' % 2 ** 3", "8"),
        ("'%d' % -2 ** 2", "4"),
        ("'%s %%s' % 'a' % 'b'", "a b"),
        ("'x' ~ '%s' % 'a' ~ 'y'", "xay"),
        ("'%s' % ('%s!' % 'a')", "a!"),
        ("'%s, %s' % ('%s' % 1, '%d' % 2)", "1, 2"),
        ("'%s' % 'a' == 'a'", "True"),
        ("'%s' % 1 if true else 2", "1"),
        ("'%s' % range(3)|list", "[0, 1, 2]"),
        ("'%s' % 'a b'.split()[1].upper()", "B"),
        ("'a' '%s' % 'b'", "ab"),
        ("'%s'%'a'", "a"),
        ("7 % 4", "3"),
        ("'abc'|length % 2", "1"),
        ("'%s and %s'|format('a', none)", "a and None"),
        ("'%(x)s'|format(x=[1.0])", "[1.0]"),
        ("'%d%%'|format(5)", "5%"),
        ("'%.1f'|format(2.25)", "2.2"),
        ("'é%3s|' % 'é'", "é  é|"),
        ("'%.1s|' % 'éa'", "é|"),
        ("'%s'|format(true)", "True"),
        (r#""it's %s" % "a 'quoted' %s""#, "it's a 'quoted' %s"),
        ("'%s' % (1)", "1"),
        ("('%s' % undef)|length", "0"),
        ("'%s' % 1.0 + 'a'", "1.0a"),
        ("'%-3d|' % -1", "-1 |"),
        ("'% 05d' % 3", " 0003"),
        ("'%+5.1f|' % 2.25", " +2.2|"),
        ("'%s' % 'a'[0]", "a"),
        ("'%s' % x.y", "3"),
    ];
    for (expression, expected) in cases {
        assert_eq!(
            render(&format!("{{{{ {expression} }}}}")).as_deref(),
            Ok(expected),
            "{expression}"
        );
    }
}

#[test]
fn what_python_refuses_is_refused() {
    let cases = [
        "'%5%|' % ()",
        "'%s' % ()",
        "'%s %s' % 'a'",
        "'%s' % (1, 2)",
        "'abc' % 1",
        "'%d' % 'a'",
        "'%f' % 'a'",
        "'%x' % 1.5",
        "'%y' % 1",
        "'%' % 1",
        "'%(a)s' % 1",
        "'%(a)s' % [1]",
        "'%(b)s' % {'a': 1}",
        "'%(a)s %s' % {'a': 1}",
        "'%s'|format",
        "'%(a' % {'a':1}",
        "'%d' % none",
        "'%d' % 1e999",
    ];
    for expression in cases {
        assert!(
            render(&format!("{{{{ {expression} }}}}")).is_err(),
            "{expression}"
        );
    }
}

#[test]
fn what_is_not_supported_is_refused_by_name() {
    // Python gives a result for each of these.
    let cases = [
        ("'%*d' % (3, 1)", "'%*' is not supported"),
        ("'%a' % 'é'", "'%a' is not supported"),
        ("'%20000d' % 1", "more than 10000"),
        ("'%.20000f' % 1", "more than 10000"),
        (
            "'%s' * 2 % (1, 2)",
            "formatting with % is supported only directly after a string literal",
        ),
        (
            "('%s' ~ '!') % 1",
            "formatting with % is supported only directly after a string literal",
        ),
        (
            "'%s' % 1 is string",
            "formatting with % is supported only directly after a string literal",
        ),
    ];
    for (expression, reason) in cases {
        let told = render(&format!("{{{{ {expression} }}}}")).unwrap_err();
        assert!(told.contains(reason), "{expression}: {told}");
    }
    assert!(
        render("{% set f = '%s' %}{{ f % 1 }}")
            .unwrap_err()
            .contains("the filter format")
    );
}

#[test]
fn only_operators_in_tags_are_rewritten() {
    let source = concat!(
        "{% raw %}{{ '%s' % 1 }}{% endraw %}{# '%s' % 1 #}\
         {% if '%s' % 1 == '1' %}\nyes {{ '%s' % 2 }}{%- endif -%} ",
        "{% set a='%s'%}{{ a }} '%s' % 3 {{ '}}' }}{{ '%s' % {'a':{'b':1}} }}"
    );
    assert_eq!(
        render(source).as_deref(),
        Ok("{{ '%s' % 1 }}yes 2%s '%s' % 3 }}{'a': {'b': 1}}")
    );
    for unchanged in [
        "",
        "{",
        "{{",
        "{{ '",
        "{#",
        "{% raw",
        "{{ 'a' % ",
        "{{ 'a' % ( ",
        "{{ 'a' %}",
        "{% if a == 'b' %}c{% endif %}",
        "{{ 7 % 2 }}",
    ] {
        assert_eq!(rewrite(unchanged), unchanged);
    }
    assert_eq!(
        rewrite("{{ 'é%s' % 'é' }}"),
        "{{ 'é%s' |__percent__( 'é') }}"
    );
}

#[test]
fn a_hostile_template_is_rewritten_in_time() {
    let n = 10_000;
    let calls = |source: &str| {
        rewrite(&format!("{{{{ {source} }}}}"))
            .matches("__percent__")
            .count()
    };
    assert_eq!(
        calls(&format!("{}1{}", "'%s' % (".repeat(n), ")".repeat(n))),
        151
    );
    assert_eq!(calls(&"'%s' % (".repeat(n)), 0);
    assert_eq!(calls(&format!("{}'%s' % 1", "(".repeat(n))), 0);
    assert_eq!(calls(&format!("{}1", "'%s' % ".repeat(n))), n);
    assert_eq!(calls(&"'a' ".repeat(n)), 0);
    assert_eq!(calls(&format!("'%s'{}", " % -'a'".repeat(n))), n);
    // A literal after the operator and a sign is an operand, not the start of another format.
    assert!(
        render("{{ '%d' % -'1' % 2 }}").is_err() && render("{{ '%d' % 2 ** -'a' % 3 }}").is_err()
    );
}
